"""What was made for other libraries, in the terms of this one: a module for each of them."""
