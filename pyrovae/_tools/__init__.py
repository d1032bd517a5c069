"""Small tools that every folder may use: seeds, files, progress, source lines."""
