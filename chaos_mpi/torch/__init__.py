"""The integration with PyTorch: data parallel modules and data loading."""
