"""What measures the product; kept out of the image."""
