"""The weights of a live model, sharded, quantised or adapted: as a folder, as a stream, and back."""
