"""Checkpoint folders of the Hugging Face form: read into parameters, and written from them."""
