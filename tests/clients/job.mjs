// What each job knows, as in job.py.

export const URL = process.env.XYSERVE_URL;
export const API = `${URL}/v1`;
export const MODEL = process.env.XYSERVE_MODEL;

export const CAPITAL = "What is the capital of France?";
export const ANSWER = "The capital of France is Paris.";
export const USAGE = [37, 8];

export const LONG = "Write a very long story about the sea.";

export const WEATHER = "What is the weather in Paris in celsius?";
export const PARIS = { city: "Paris", unit: "celsius" };
export const WEATHER_SCHEMA = {
  type: "object",
  properties: { city: { enum: ["Paris", "Rome", "Oslo"] }, unit: { enum: ["celsius", "fahrenheit"] } },
  required: ["city", "unit"],
};

export const REPORT = "It is 31 degrees celsius in Paris.";
export const EARLIER = {
  Rome: "It is 22 degrees celsius in Rome.",
  Oslo: "It is 7 degrees celsius in Oslo.",
};
export const question = (city) => WEATHER.replace("Paris", city);
