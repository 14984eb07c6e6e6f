"""What follows from a cascade alone: extents, dependence, passes, footprints, counts; and targets as data."""
