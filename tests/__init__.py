"""The tests. `HATRACK_CPU` has them run as on a lesser CPU, for which torch must know before it is imported."""

from hatrack import cpu

cpu.limit_torch()
