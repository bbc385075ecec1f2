"""Programs that measure; each says at its head how it is run. A package, so that tests can take parts of them."""
