"""The front door: Open Inference Protocol and OpenAI routes over pipelines; walks each task through its stages."""
