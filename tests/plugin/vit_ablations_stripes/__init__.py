"""An optimization and a data set of one's own, as a package."""
