"""What the config.json of each family of decoders says; a file for each family."""
