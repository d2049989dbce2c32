"""From singular vectors to factors as they are stored, and the certificate of what those keep."""

NEGLIGIBLE = 1e-8  # share of the kept energy below which further terms only store rounding noise
