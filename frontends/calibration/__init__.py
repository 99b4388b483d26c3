"""Read calibration sets from local files, and choose the token windows that a quantiser looks at."""
