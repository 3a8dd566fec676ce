"""The frozen model: found, described, fingerprinted, loaded, streamed layer by layer."""
