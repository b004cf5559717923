"""Small models that papers use."""
