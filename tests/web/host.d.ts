/** What the pack uses of ComfyUI's frontend, as its modules give it. */

interface Widget {
  name: string;
  value: unknown;
  serialize?: boolean;
  callback?: (value: unknown) => void;
}

declare module "*/scripts/app.js" {
  export interface Node {
    id: string | number;
    comfyClass: string;
    size: [number, number];
    inputs?: { name: string; link: number | null }[];
    widgets?: Widget[];
    computeSize(): [number, number];
    setSize(size: [number, number]): void;
    addDOMWidget(name: string, type: string, element: HTMLElement, options: object): Widget;
  }
  export interface Extension {
    name: string;
    setup?(): void;
    nodeCreated?(node: Node): void;
    afterConfigureGraph?(): void;
  }
  export interface Graph {
    id: string;
    nodes: (Node & { subgraph?: Graph })[];
  }
  export const app: {
    rootGraph?: Graph;
    graph: Graph;
    configuringGraph: boolean;
    canvas: {
      processMouseWheel(event: Event): void;
      processMouseDown(event: Event): void;
      processMouseMove(event: Event): void;
      processMouseUp(event: Event): void;
    };
    registerExtension(extension: Extension): void;
  };
}

declare module "*/scripts/api.js" {
  export const api: {
    addEventListener(name: string, listener: (event: CustomEvent) => void): void;
    fetchApi(route: string): Promise<Response>;
  };
}
