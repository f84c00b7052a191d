"""How shapes and types of the package's functions are checked while its tests run."""

from beartype import BeartypeConf, beartype

check = beartype(conf=BeartypeConf(is_pep484_tower=True))  # a whole number will do for a float
