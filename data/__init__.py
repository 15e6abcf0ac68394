"""In: the name of a dataset. Out: batches of uint8 pixels and targets, and augmented float batches for the model."""
