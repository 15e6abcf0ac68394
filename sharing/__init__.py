"""The folder of a run or a conversion comes in; a record, a model card and a verified upload go out."""
