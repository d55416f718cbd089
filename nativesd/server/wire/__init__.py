"""What every API needs of HTTP: who may ask, bodies and pictures that come in, answers that go out."""
