"""Ground floor: typed configuration and the errors a user may see. Imports nothing of ours above it."""
