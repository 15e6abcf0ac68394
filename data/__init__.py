"""A dataset comes in; batches of uint8 pixels and, augmented on the device, of floats for the model go out."""
