"""What a run will take: memory, time, disk; whether it fits. Imports no torch."""
