"""Tar files of images, as WebDataset and img2dataset write them."""
