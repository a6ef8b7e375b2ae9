"""Addresses of leaves, for transforms."""

from memjax.naming import fold_in_path, path_string

__all__ = ['fold_in_path', 'path_string']
