"""Private and undocumented names of other libraries, each checked before it is used."""
