"""Compares a timm Swin on a photograph before and after accelerate: ``python -m swinkernels.demo``."""
