"""The samplers themselves: pure functions of a denoiser, a start and descending sigmas."""
