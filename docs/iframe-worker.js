// Search in pages that were opened from a disk. Browsers start no worker there: a hidden frame runs its script instead.
if (location.protocol === "file:") {
  // The theme's script looks for this name.
  window.IFrameWorker = class extends EventTarget {
    constructor(url) {
      super()
      const frame = document.createElement("iframe")
      frame.hidden = true
      document.body.append(frame)
      this.inside = frame.contentWindow
      this.ready = new Promise(resolve => (frame.onload = resolve))
      this.inside.document.open()
      this.inside.postMessage = data => this.dispatchEvent(new MessageEvent("message", { data }))
      this.inside.document.write(`<script src="${new URL(url, location.href)}"></script>`)
      this.inside.document.close()
    }

    postMessage(data) {
      this.ready.then(() => this.inside.dispatchEvent(new MessageEvent("message", { data })))
    }
  }
  window.Worker = window.IFrameWorker
}
