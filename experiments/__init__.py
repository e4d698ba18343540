"""Measurements and sweeps; results/ holds their logs and tables."""
