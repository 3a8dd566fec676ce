"""The frozen model: found, described by its headers, loaded, told apart, streamed layer by layer."""
