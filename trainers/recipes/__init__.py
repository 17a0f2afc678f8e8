"""One file per method; each reads like the method section of its paper."""
