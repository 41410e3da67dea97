"""One evaluation by generation: weights into the engine, proven by the canary; answers scored; scores that steer."""
