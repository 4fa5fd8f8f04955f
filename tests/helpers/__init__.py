"""Reference formulas, networks and checks that several tests share."""
