"""The NumPy float64 oracle: any cascade interpreted, and closed forms to hold it against."""
