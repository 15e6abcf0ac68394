"""A checkpoint of timm or transformers comes in and one of ours goes out, or the other way round."""
