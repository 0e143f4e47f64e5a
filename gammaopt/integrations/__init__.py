"""Other packages' registries, one module each; importing the module makes gammaopt known there."""
