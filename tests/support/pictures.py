"""The drawn image files of the benches, under the name that the tests use."""

from bench.pictures import data_url, draw, image_file, image_part

__all__ = ["data_url", "draw", "image_file", "image_part"]
