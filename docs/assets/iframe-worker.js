// Search in a site that is opened from a folder: browsers refuse workers there, so a worker's script runs in a hidden
// frame of the page. The theme looks for the name IFrameWorker.
class IFrameWorker extends EventTarget {
  constructor(url) {
    super()
    const frame = document.createElement("iframe")
    frame.hidden = true
    this.ready = new Promise((done) => (frame.onload = done)).then(() => {
      const inner = frame.contentWindow
      const load = (source) =>
        new Promise((done, fail) => {
          const script = inner.document.createElement("script")
          Object.assign(script, { src: source, onload: done, onerror: fail })
          inner.document.body.append(script)
        })
      inner.postMessage = (data) => this.dispatchEvent(new MessageEvent("message", { data }))
      inner.importScripts = (...sources) => sources.reduce((before, s) => before.then(() => load(s)), Promise.resolve())
      return load(url).then(() => inner)
    })
    this.frame = frame
    document.body.append(frame)
  }
  postMessage(data) {
    this.ready.then((inner) => inner.dispatchEvent(new inner.MessageEvent("message", { data })))
  }
  terminate() {
    this.frame.remove()
  }
}
if (location.protocol === "file:") Object.assign(window, { IFrameWorker, Worker: IFrameWorker })
