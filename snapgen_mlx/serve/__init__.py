"""A loaded model behind HTTP: OpenAI's image API and a page of its own."""
