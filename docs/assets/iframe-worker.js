// A page that was opened from a file may start no worker, and the search is one. There, this runs it in a hidden frame.
// The search's own script looks for the name IFrameWorker to know that it is in one.
class IFrameWorker extends EventTarget {
  constructor(url) {
    super();
    this.onmessage = null;
    this.frame = document.createElement("iframe");
    this.frame.hidden = true;
    document.body.appendChild(this.frame);
    addEventListener("message", (event) => {
      if (event.source !== this.frame.contentWindow) return;
      const passed = new MessageEvent("message", { data: event.data });
      this.dispatchEvent(passed);
      if (this.onmessage) this.onmessage(passed);
    });
    const page = this.frame.contentDocument;
    page.open();
    page.write(`<!doctype html><body><script>
      postMessage = (data) => parent.postMessage(data, "*");
      importScripts = (...urls) => urls.reduce((before, url) => before.then(() => new Promise((resolve) => {
        const script = document.createElement("script");
        script.src = url;
        script.onload = resolve;
        document.body.appendChild(script);
      })), Promise.resolve());
    <\/script><script src="${new URL(url, location)}"><\/script></body>`);
    page.close();
    // Not before: opening a document takes its listeners away.
    this.ready = new Promise((resolve) => this.frame.contentWindow.addEventListener("load", resolve, { once: true }));
  }

  postMessage(data) {
    this.ready.then(() => this.frame.contentWindow.dispatchEvent(new MessageEvent("message", { data })));
  }

  terminate() {
    this.frame.remove();
  }
}

if (location.protocol === "file:") {
  window.IFrameWorker = IFrameWorker;
  window.Worker = IFrameWorker;
}
