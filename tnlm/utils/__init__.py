"""What every part of the library may use, and what knows none of them."""
