"""Reference values that tests compare with, and the programs that write them."""
