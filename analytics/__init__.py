"""Takes usage events exactly once into effect and answers questions about them; never stands in a request's way."""
