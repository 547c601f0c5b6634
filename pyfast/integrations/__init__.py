"""pyfast inside other packages' models; each module imports the package it serves when used."""
