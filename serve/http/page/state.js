// What the page knows. The modules share this object; nothing else is global.

export const state = {
  model: null, // the model's entry in /v1/models
  names: [], // of all models
  run: null, // the samples on display: see newRun in run.js
  image: null, // that samples start from, scaled to the model's size, as a data URL
  request: null, // the AbortController of the request in progress
  link: null, // the parameters of the address that have not been sampled yet
};
