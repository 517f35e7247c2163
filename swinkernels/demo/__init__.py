"""Compares a timm Swin before and after ``swinkernels.accelerate``, on a photograph: ``python -m swinkernels.demo``."""
