"""The checks of ``fedgraft site doctor``: everything that taking part needs."""
