"""Fitting: models made on the spot, and interventions at the places of a grid. Needs torch."""
