"""A weather forecast that is learned day by day, over several sessions of one model."""
