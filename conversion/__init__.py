"""A checkpoint of timm or transformers comes in and a vit_simple checkpoint goes out, or the other way around."""
