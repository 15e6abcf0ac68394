"""A run's folder comes in; a record, a model card and a verified upload go out."""
