// The microphone as blocks of PCM16, and what can go wrong with it, in words.

/** Why this page cannot hear anything here, or "". */
export function obstacle() {
  if (!isSecureContext) {
    return "This page came over plain http from another machine, and browsers give such pages no microphone. "
      + "Give the server a certificate and open the page with https:// (README: “Captions in a browser”); on the "
      + `server's own screen http://localhost:${location.port || 80}${location.pathname} works as it is.`;
  }
  if (navigator.mediaDevices?.getUserMedia && window.AudioWorkletNode) return "";
  return "This browser cannot record sound: update it.";
}

/** The microphones: [{deviceId, label}]. Labels are empty until the user has allowed the page to listen. */
export async function microphones() {
  const devices = await navigator.mediaDevices.enumerateDevices();
  return devices.filter(({ kind, deviceId }) => kind === "audioinput" && deviceId);
}

/** What an exception of `Microphone.open` means. */
export function explain(error) {
  switch (error.name) {
    case "NotAllowedError":
      return "The browser was told not to let this page use the microphone: allow it beside the address.";
    case "NotFoundError":
    case "OverconstrainedError":
      return "No microphone was found.";
    case "NotReadableError":
      return "The microphone is in use by another program, or the system does not give it away.";
    default:
      return `The microphone cannot be used (${error.message || error.name}).`;
  }
}

/** `on.audio(samples, level)`: an Int16Array of 80 ms at 16 kHz, its level in dB. `on.gone()`: it was unplugged. */
export class Microphone {
  constructor(on) { this.on = on; }

  /** Begin to listen; `deviceId` "" is the system's choice. Throws what `explain` explains. */
  async open(deviceId) {
    // What browsers do to the sound for telephony does a recognizer no good.
    const audio = { channelCount: 1, echoCancellation: false, noiseSuppression: false, autoGainControl: false };
    if (deviceId) audio.deviceId = { exact: deviceId };
    this.stream = await navigator.mediaDevices.getUserMedia({ audio });
    try {
      await this.#connect(new AudioContext({ sampleRate: 16000, latencyHint: "interactive" }));
    } catch (error) {
      await this.context.close();
      if (error.name !== "NotSupportedError") throw error;
      await this.#connect(new AudioContext()); // older Firefox: only the device's own rate (bugzilla 1674892)
    }
    const [track] = this.stream.getAudioTracks();
    this.label = track.label;
    track.onended = () => this.on.gone();
  }

  async #connect(context) {
    this.context = context;
    await context.audioWorklet.addModule(new URL("recorder.js", import.meta.url));
    const source = context.createMediaStreamSource(this.stream);
    const recorder = new AudioWorkletNode(context, "recorder", { numberOfOutputs: 0 });
    recorder.port.onmessage = ({ data }) => this.on.audio(data.samples, data.level);
    source.connect(recorder);
    // A telephone call on a phone, for one, suspends it.
    context.onstatechange = () => {
      if (!["closed", "running"].includes(context.state)) context.resume().catch(() => {});
    };
    await context.resume();
  }

  close() {
    this.stream?.getTracks().forEach((track) => { track.onended = null; track.stop(); });
    if (this.context?.state !== "closed") this.context?.close();
  }
}
